"""REPORT: from a results folder to answers.

`readings` (what each run reached at equal rounds, bytes and FLOPs), `comparison` (intervals, paired differences),
`tables`, `notes` and `figures`, `document` and `page` (one HTML page, and Markdown), `frames` (the same from Python).
"""
