"""What a run's gradient norms say, as one HTML file and as a few lines in the terminal: `distclip report`.

Stands on `distclip.runs`, whatever program made the run, and on the policies of distclip, which it replays over norms.
Sees numbers that were logged, never a gradient; `command.write_report` is the way in.
"""
