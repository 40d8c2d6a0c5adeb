"""The ground floor: how files are opened, weights are checked, strings of a disk are shown. Imports no other room."""
