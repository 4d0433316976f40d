"""How rules are run; knows no algorithm."""
