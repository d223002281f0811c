"""The Ray Serve deployments of raypg, one per file."""
