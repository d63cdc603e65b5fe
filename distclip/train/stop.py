"""Stop signals as requests: training finishes the step, saves, and only then ends."""

import signal
from types import FrameType, TracebackType

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def heeded() -> list[signal.Signals]:
    """The stop signals, except those that `nohup` or a shell's `&` made this process ignore."""
    return [s for s in STOP_SIGNALS if signal.getsignal(s) != signal.SIG_IGN]


def exit_code(received: signal.Signals) -> int:
    """What a shell reports for a process ended by a signal: 130 for SIGINT, 143 for SIGTERM."""
    return 128 + received


class StopSignals:
    """While entered, a stop signal is remembered instead of ending the process."""

    def __init__(self) -> None:
        self.received: set[int] = set()
        self.previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> "StopSignals":
        for number in heeded():
            self.previous[number] = signal.signal(number, self.remember)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)  # see launch.py: some may be waiting
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def remember(self, number: int, frame: FrameType | None) -> None:
        # The launcher passes on to each rank what the terminal may have sent it as well: twice is as once.
        self.received.add(number)

    def hang_up(self) -> None:
        """Stop as for a terminal that was closed: the reader of our output has gone."""
        self.received.add(signal.SIGHUP)

    def wishes(self) -> list[float]:
        """One number per signal, to be summed over ranks with the step's metrics."""
        return [float(s in self.received) for s in STOP_SIGNALS]


def agreed(sums: list[float]) -> signal.Signals | None:
    """The signal to stop for, from the summed requests: the same on every rank."""
    return next((s for s, wish in zip(STOP_SIGNALS, sums, strict=True) if wish > 0), None)
