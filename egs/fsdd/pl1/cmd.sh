# Where the jobs run: 'local' on this machine, 'slurm' as set up in conf/slurm.conf.
# ./run.sh --cmd does the same for one run. The same file in every recipe.
export cmd_backend=local
