"""``spectral-adapters compare``: methods at equal budgets, on data that installs as packages."""
