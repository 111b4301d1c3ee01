"""The commands of `fedseg-site`, each beside its options; they decide nothing themselves."""
