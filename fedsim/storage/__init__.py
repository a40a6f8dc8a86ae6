"""STORAGE: where files lie.

`place` (a folder or an object store), `checkpoint` (versions of a tree), `sealed` (files that show whether they were
changed), `locking` (one writer).
"""
