"""What `fedseg-site doctor` looks at, by noun: machine, network, folder and studies."""
