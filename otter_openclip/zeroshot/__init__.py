"""Zero-shot multi-label classification: metrics, class features and images; needs no command line.

Both `otter-openclip eval` and the evaluation inside training are built from it.
"""
