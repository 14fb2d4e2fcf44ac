"""The method in numpy and torch: geometry, settings, rotary tables, plans, passes.

Knows nothing of vLLM or of devices; what a device must be able to do is said here, in
`provider` (one pass of attention) and `device` (everything).
"""
