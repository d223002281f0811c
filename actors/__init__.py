"""The Ray actors of raypg, one per file: they receive messages, ask ``raypg.core``, and send messages."""
