"""Starting runs: on this machine, and through submitit on a Slurm cluster."""
