"""LEARNING: what is learned, and how one participant learns it.

`task` (family + data + loss + score), `objectives`, `training` (the request and the local loop), `meter` (FLOPs),
`steps` and `batched` (who answers requests), `starts`, `rates`, `coverage`, `exits`, `adapters`, `ensemble`
(sub-models), `server_opt`.
"""
