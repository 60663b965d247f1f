"""How near to bare matrix products is `token_stats`, and to what do its peers come in the same run?

Questions (`--questions`), one result and one plot each:

    logp_entropy  log-prob and entropy of each token, forward and backward, random upstream gradient per token
    reverse_kl    the same for KL(student || teacher) between two heads
    frozen        log-prob and entropy over a frozen head: no gradient of the weight
    scaling       time against N and V, peak memory against N past the budget
    error         each output and gradient against float64, for float32 and bfloat16 inputs

Every side is first compared with float64: one that computes something else is not timed. Then all take turns, each
once a round, with the bare products among them; ratios are taken within a round, for machines drift. Products write
into memory that is there, in the faster of two orientations; a further row has them allocate their results, as any op
in a training step must. Peak memory is over inputs and gradients, in a fresh
process per side. A peer that is not installed or cannot run is listed with the reason; peers that give less (no
entropy, one gradient for all tokens) are marked so. The CPU computes in float32, CUDA in bfloat16.

    python benchmarks/kernels.py --threads 2
    python benchmarks/kernels.py --device cuda
    python benchmarks/kernels.py --questions logp_entropy --shapes 1024x512x50304 --rounds 7

Peers: `pip install trl==1.16.0 liger-kernel cut-cross-entropy quack-kernels`. Writes `kernels-DEVICE-QUESTION.json`
(every round), `.csv` and, where matplotlib is installed, `.png`.
"""

# Nothing else is here, and the folder does not stay on the path: transformers looks for a package named kernels.
if __name__ == "__main__":
    import sys
    from pathlib import Path

    here = Path(__file__).parent
    sys.path.append(str(here))  # under PYTHONSAFEPATH a script's own folder is not there
    from kernels_questions import main

    sys.path[:] = [folder for folder in sys.path if Path(folder) != here]
    main(__doc__)
