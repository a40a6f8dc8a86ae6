"""Wrong requests by the thousand: `requests` makes them, `answers` says what is wrong with how they are answered.

The suite asks 2,000 of them in this process; `python -m tests.fuzz --requests 20000 --seed 1` asks others, for longer.
"""
