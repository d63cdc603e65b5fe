"""The names of numbers, wherever they are written to: before or after clipping is part of the name."""

PRE_CLIP = "grad_norm/pre_clip"
POST_CLIP = "grad_norm/post_clip"
LARGEST = "grad_norm/max"  # of the norms before clipping that were finite, since the last record
LAYER = "grad_norm/layer/{}"  # of what watch= asks for, before clipping
ZEROS = "grad_zeros/layer/{}"  # the share of its elements that are 0, with watch_zeros=True

FINGERPRINT = "fingerprint"  # of all gradients before clipping, a text: numbers of 64 bits are no float64
FINGERPRINT_OF = "fingerprint/{}"  # of each
FINGERPRINT_DIFFER = "fingerprint_differ"  # whose replicas do not hold the same bits

COEF = "clip/coef"
MAX_NORM = "clip/max_norm"
CLIPPED = "clip/clipped"  # 1 or 0, as the next
SKIPPED = "clip/skipped"
FRACTION = "clip/fraction"  # of the steps since the last record that were clipped
EXTRA = "clip/{}"  # what the policy reports of itself
STEP = "clip/step"  # where a library has no steps of its own, or too many


def name_and_layer(key: str) -> tuple[str, str]:
    """For libraries with labels: ``grad_norm/layer/head`` is the ``grad_norm/layer`` of ``head``.

    >>> name_and_layer("grad_norm/layer/head.weight"), name_and_layer("clip/coef")
    (('grad_norm/layer', 'head.weight'), ('clip/coef', ''))
    """
    kind, between, layer = key.partition("/layer/")
    return (f"{kind}/layer", layer) if between else (key, "")
