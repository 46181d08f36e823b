"""Commands of ``seg4diff`` that show what a model does: regions, analyze, generate. Light to import."""
