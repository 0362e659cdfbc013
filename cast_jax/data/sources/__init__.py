"""Where images and their instances come from; one file a format."""
