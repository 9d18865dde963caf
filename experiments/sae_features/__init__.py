"""What the features of a sparse autoencoder fire on."""
