"""The ground floor: how files are opened, folders are marked and strings from a disk are shown. Imports no other room."""
