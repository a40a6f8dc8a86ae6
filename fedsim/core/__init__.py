"""CORE: what everything else is made of; knows torch, numpy and rich alone.

`tree` (verbs on dict[str, Tensor]), `updates` (what clients send, and its means), `seeding` (random streams),
`submodel` (named axes, cuts), `fields` (bad input is named), `environment`, `numerics`, `terminal` (a line of text).
"""
