"""What lies on disk: headers, which files are read, tensors as floats whatever they are stored as.

In: a folder, untrusted. Out: `StoredWeights`. Nothing here knows what a model needs.
Begin at `stored`.
"""
