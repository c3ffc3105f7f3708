# Where the corpus is: a folder, or `downloads` to fetch it (under 100 MB) into ./downloads.
# Unset: ${ESPNET_PL_SHARED}/data/an4, if that variable is set.
export AN4=${AN4:-}
