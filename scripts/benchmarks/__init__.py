"""What a checkpoint costs here, ours beside others', and against what this machine can do: `scripts/bench`.

    __main__      the command line; which suites run, at which scale
    frame         contenders that take turns, paired ratios, and the rows with their goals
    contenders    how asyncckpt and its peers save one training run, and read it back
    raw           plain copies, writes and reads: the limits
    stall, save, restore, object, tensors, steps, memory, interference    one suite each, `run(bench) -> Outcome`
    report        tables, JSON, and README's section made from it
    plot          pictures

Nothing outside this folder imports it but tests/test_bench.py. It uses ../bench_sink.py and tests/servers.py.
"""
