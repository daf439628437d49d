"""Unmodified Linux guests without root: a distribution's kernel, an initramfs with busybox, our tool and an agent.

`image` builds and caches, `machine` says how it is started; `..agent` runs commands in it.
"""
