"""Commands of the command line other than those of LightningCLI."""
