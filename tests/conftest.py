"""
The tests are about the CPU, also where there is a GPU: what is computed there is not the same twice, and the exact
tests would fail. Processes that tests start inherit it.
"""

import os


os.environ.update(CUDA_VISIBLE_DEVICES="", ACCELERATE_USE_CPU="true")
