"""imagend fetch: models come in from the network, checked before they are installed. A process of its own."""
