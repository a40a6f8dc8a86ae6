"""Attacks on what was sent, each a function of what an attacker sees and knows; `fedsim.privacy.audit` runs them."""
