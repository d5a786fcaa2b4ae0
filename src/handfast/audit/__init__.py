"""What other people's checkpoints say of their epochs: ``handfast audit PATH``.

Read in this order: ``found`` (the vocabulary), ``pickles`` and ``torch_file`` (how files are read
that may do harm), ``formats`` (who writes what), ``checks`` (what is wrong with it), ``report``.
"""
