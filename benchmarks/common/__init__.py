"""What every measurement stands on: records, data sets, models, metrics, embeddings, figures and
the Engine.
"""
