"""The commands beside those of LightningCLI, one file each, which defines what :class:`~..entry.Command` says."""
