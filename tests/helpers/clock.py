# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Time for the tests: it passes when they say so."""


class Clock:
    """Takes the place of the module `time`. Stands still but for the seconds that are said to pass."""

    def __init__(self):
        self.now, self.slowness = 0, 1

    def perf_counter(self):
        return self.now

    def wait(self, seconds):
        self.now += self.slowness * seconds

    def let_take(self, module, seconds):
        """Each run of `module` takes `seconds` of its input."""
        module.register_forward_pre_hook(lambda _, arguments: self.wait(seconds(arguments[0])))
