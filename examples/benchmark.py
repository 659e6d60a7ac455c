# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
How much faster a CTS model is than itself without token sharing.

    python examples/benchmark.py --preset small-512 --json small-512.json
    python examples/benchmark.py --preset base-512 --device cuda --dtype bfloat16 --compile --batch_size 1 32
    python examples/benchmark.py --model outputs/camvid --token_reduction 0.3 0.4375 --image_size 512 768 --plot a.png
    python examples/benchmark.py --preset small-1024 --superpatch_levels 2 4 --token_reduction 0.6 0.2,0.4 --end_to_end
    python examples/benchmark.py --model outputs/camvid --sharing_threshold 0.9 --images camvid/images/test

prints tokens, latency, throughput, memory and multiply-adds of both, the ratio with its quartiles beside the bound
that the multiply-adds set, and the time of each part of the forward; with --end_to_end also of the way from picture to
label map. The presets are tiny-512, small-512, small-768, base-512 and large-640, models of the paper with random
weights, whose policy reads the image at half resolution; small-1024 and large-1024, which share 2 x 2 and 4 x 4
patches; and models of transformers, which --help lists.
"""

from cts_hf.benchmark.measuring import main


if __name__ == "__main__":
    main()
