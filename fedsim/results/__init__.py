"""RESULTS: what is left of a run.

`tables` (rows <-> Parquet), `rows`, `store` (a run's place in a folder), `provenance` and `machine` (what computed it),
`export` and `card` (a grown model as a Hugging Face folder).
"""
