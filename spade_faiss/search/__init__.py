"""Search of the nearest normals' feature maps: one module per search method, all of them behind one protocol."""
