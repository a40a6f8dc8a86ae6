"""CLUSTER: machines elsewhere. `doctor` (what would make a run fail), `submit` (a run sent, followed, fetched),
`cluster_file` (a file for `ray up`).
"""
