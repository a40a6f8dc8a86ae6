"""SWEEP: several runs into one folder. `suites` (which), `runner` (skip, resume, go on after a failure), `jobs` and
`attempt` (several at once), `progress`, `profile`, `tensorboard` (what is shown).
"""
