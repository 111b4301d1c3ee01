"""What an adversary with every released vector could find out: epsilon from below, and leaks.

`canaries` runs a study's mechanism on crafted patients, `bounds` turns guesses about them into a
lower bound on epsilon, `checks` tests noise and sampling by themselves, `membership` attacks models
that were trained on real patients, `report` says it in words. An audit can refute a claim, never
prove one.
"""
