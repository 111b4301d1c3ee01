"""The commands of `fedseg`, each beside its options; they compute nothing themselves."""
