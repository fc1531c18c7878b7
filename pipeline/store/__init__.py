"""The artifact store: folders named by fingerprint, on a disk or at a URL."""
