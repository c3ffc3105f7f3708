# Where the corpus is: a folder, or `downloads` to fetch it (10 MB) into ./downloads.
# Unset: ${ESPNET_PL_SHARED}/data/fsdd, if that variable is set.
export FSDD=${FSDD:-}
