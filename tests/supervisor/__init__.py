"""Runs the services of compose/compose.yaml as plain processes, each on a loopback address of its own."""
