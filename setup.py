"""Hands over to pyproject.toml, for tools that still call setup.py."""

from setuptools import setup

setup()
