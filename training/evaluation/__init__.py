"""What adapters and other methods do, measured: pictures, measures, judges, report."""
