"""Compiled twins of `ops`: each computes what the torch reference computes, faster, and is held to it by tests.

`native` finds and calls the CPU library, `build` compiles it. Where there is none, everything works on torch.
"""
