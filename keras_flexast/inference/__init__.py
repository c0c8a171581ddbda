"""Scores, embeddings and timelines of sounds, by a run or by what was exported from it."""

from keras_flexast.inference.artifacts import FileEmbeddings, FileScores
from keras_flexast.inference.cascade import CascadeClassifier, load_cascade
from keras_flexast.inference.classifier import Classifier, load_classifier
from keras_flexast.inference.explanation import Explanation, explain_file
from keras_flexast.inference.timeline import Timeline, refuse_timeline

__all__ = [
    "CascadeClassifier",
    "Classifier",
    "Explanation",
    "FileEmbeddings",
    "FileScores",
    "Timeline",
    "explain_file",
    "load_cascade",
    "load_classifier",
    "refuse_timeline",
]
