"""From pictures to features: data sets, decoding, backbones, and batches of feature maps."""
