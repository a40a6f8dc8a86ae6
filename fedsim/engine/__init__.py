"""ENGINE: one federation. `aggregator` and `participant` (the two roles), `cohort` (who takes part, and with what),
`cost` and `gpu` (what it takes, counted beforehand), `progress` (what a run tells of itself).
"""
