"""STORAGE: where files lie.

`place` (a folder or an object store), `checkpoint` (versions of a tree), `locking` (one writer).
"""
