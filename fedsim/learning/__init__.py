"""LEARNING: what is learned, and how one participant learns it.

`task` (family + data + loss + score), `training` (the local loop, FLOPs), `together` (several trainings in one batched
computation), `starts`, `rates`, `coverage`, `exits`, `adapters`, `ensemble` (sub-models), `server_opt`.
"""
