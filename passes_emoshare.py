"""Which clips go through a network together: neighbours in length, so that little is padded."""

# What goes through a backbone at once on a CPU, where padding soon costs more than a large batch gains. Against single
# clips of 4 s, eight of one length take 0.74 times as long in bfloat16 (AMX), 0.89 times in float32 (AMX) and 0.97
# times in float32 (AVX2); eight of 1 to 8 s, 1.05 times in bfloat16 and 1.4 times in float32 (AMX).
CLIPS_PER_CPU_PASS = 8
PADDING_OF_CPU_PASS = 0.05


def passes(lengths, most, padding):
    """
    Args:
        lengths: of the clips, in any unit.
        most: number of clips in a pass.
        padding: the largest fraction of a pass that may be padding.

    Returns:
        `list[list[int]]`: the indices of the clips of each pass, the shortest clips first.
    """
    found, total = [], 0
    for index in sorted(range(len(lengths)), key=lambda index: lengths[index]):
        length = lengths[index]  # the longest so far
        total += length
        if not found or len(found[-1]) == most or total < (1 - padding) * length * (len(found[-1]) + 1):
            found.append([])
            total = length
        found[-1].append(index)
    return found


def in_passes(run, inputs, lengths, num_frames):
    """
    Runs a backbone on a batch as a CPU does it fastest: in passes of clips of similar length.

    Args:
        run: function of inputs and lengths, as below, to a dict of (batch, frames, width).
        inputs: (batch, length, ...), padded on the right.
        lengths: (batch,) int64, each clip's own length.
        num_frames: (batch,) int64, frames that they become.

    Returns:
        As `run` does, zero past the frames of a clip's pass.
    """
    rows_of_passes = passes(num_frames.tolist(), CLIPS_PER_CPU_PASS, PADDING_OF_CPU_PASS)
    if len(rows_of_passes) == 1:
        return run(inputs, lengths)
    states = {}
    for rows in rows_of_passes:
        own = lengths[rows]
        for name, features in run(inputs[rows, : int(own.max())], own).items():
            if name not in states:
                states[name] = features.new_zeros(len(inputs), int(num_frames.max()), features.shape[-1])
            states[name][rows, : features.shape[1]] = features
    return states
