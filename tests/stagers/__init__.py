"""Tests of `stagers`, file by file."""
